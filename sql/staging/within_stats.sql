-- How often and how strongly each feature fires in a range: stored counts where they are exact, values for the rest.
--
-- Grain:   one row per feature, source and way of counting, if the feature fires; without sources, source is null or
--          the document's.
-- Reads:   src_feature_stats, src_feature_sources, within_parts, within_rest, stg_token_major, part_folder, peak_value
-- Units:   add the rows up. sums and max_value are in the units of the activations (squared). max_value is the
--          strongest value with its sign: null of a source, which no part stores. The arguments are those of
--          within_documents.
-- Ask it:  from within_stats(null, null, null, 0, 3)
--
-- As in within_rest, a list without tokens has one that does not exist.
create or replace macro within_stats(sources, since, until, from_part, to_part) as table
with counted as materialized (
    from within_parts(sources, since, until, from_part, to_part)
),
rest as materialized (
    from within_rest(sources, since, until, from_part, to_part)
),
to_read as materialized (
    from rest
    union all
    select -1, null where not exists (from rest)
)
select feature_id, null as source, n_tokens, sum_value, sum_squares, max_value
from src_feature_stats
where sources is null and n_tokens > 0 and part_folder(filename) in (from counted)
union all
select feature_id, stored.source, n_tokens, sum_value, sum_squares, null as max_value
from src_feature_sources as stored
where list_contains(sources, stored.source) and not is_rest and part_folder(filename) in (from counted)
union all
select
    feature_id,
    to_read.source,
    count(*)                   as n_tokens,
    sum(value::double)         as sum_value,
    sum(pow(value::double, 2)) as sum_squares,
    case when sources is null then peak_value(value)::double end as max_value
from stg_token_major
join to_read using (token_id)
group by feature_id, to_read.source;
