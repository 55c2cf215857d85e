-- How the values of a feature are distributed, under a filter.
--
-- Grain:   one row per bin with tokens, the weakest first.
-- Reads:   under_filter_of_feature, value_bin, bin_edge
-- Units:   a bin holds the values from from_value to below to_value, a quarter of an octave, in the units of the
--          activations; share is the bin's share of the tokens at which the feature fires under the filter. The filter
--          is that of feature_numbers. Without one the rows are those of feature_histogram, which reads stored counts.
-- Parameters: feature bigint, source text = null, document_key text = null, since text = null, until text = null,
--          role text = null, threshold double = 0, with_feature bigint = null, without_feature bigint = null
-- Ask it:  how strong is feature 12 in the novels?  from feature_values(12, 'novels')
create or replace macro feature_values(
    feature,
    source := null,
    document_key := null,
    since := null,
    until := null,
    role := null,
    threshold := 0,
    with_feature := null,
    without_feature := null
) as table
with bins as (
    select value_bin(value) as bin, count(*) as n_tokens
    from under_filter_of_feature(
        feature, source, document_key, since, until, role, threshold, with_feature, without_feature
    )
    where passes
    group by bin
)
select
    bin_edge(bin)                    as from_value,
    bin_edge(bin + 1)                as to_value,
    n_tokens,
    n_tokens / sum(n_tokens) over () as share
from bins
order by bin;
