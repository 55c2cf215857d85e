-- How the values of a feature are distributed in a source, between two dates, or in a range of parts.
--
-- Grain:   one row per bin with tokens, the weakest first.
-- Reads:   within_documents, stg_part_histogram, stg_feature_major, stg_document_places, value_bin, bin_edge
-- Units:   a bin holds the values from from_value to below to_value, a quarter of an octave, in the units of the
--          activations; share is the bin's share of the tokens at which the feature fires. The range is that of
--          summary_within. Stored counts answer, except for a source, and for parts with documents in and out of the
--          range: there the feature's values are read.
-- Parameters: feature bigint, source text = null, since text = null, until text = null, from_part bigint = null,
--          to_part bigint = null
-- Ask it:  how strong is feature 12 in the novels?  from histogram_within(12, 'novels')
create or replace macro histogram_within(
    feature, source := null, since := null, until := null, from_part := null, to_part := null
) as table
with chosen as materialized (
    from within_documents(case when source is not null then [source] end, since, until, from_part, to_part)
),
to_read as materialized (
    select document_id from chosen where source is not null or not is_counted
),
-- Where there is nothing to read, a feature that does not exist is asked for, too: DuckDB then opens no file.
firing as (
    select token_id, value
    from stg_feature_major
    where feature_id = feature
        and feature between low and high
        and feature_id in (select case when count(*) > 0 then feature::integer else -1 end from to_read)
),
bins as (
    select bin, n_tokens
    from stg_part_histogram
    where feature_id = feature
        and source is null
        and folder in (select folder from chosen where is_counted)
    union all
    select value_bin(value) as bin, 1 as n_tokens
    from firing
    asof join stg_document_places as places on firing.token_id >= places.first_token_id
    where document_id in (from to_read)
)
select
    bin_edge(bin)                         as from_value,
    bin_edge(bin + 1)                     as to_value,
    sum(n_tokens)::bigint                 as n_tokens,
    sum(n_tokens) / sum(sum(n_tokens)) over () as share
from bins
group by bin
order by bin;
