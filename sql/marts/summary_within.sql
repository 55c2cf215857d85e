-- How often and how strongly each feature fires in a source, between two dates, or in a range of parts.
--
-- Grain:   one row per feature, or listed feature, by feature_id, those that never fire there too.
-- Reads:   stg_feature_stats, within_stats, feature_names, peak_value
-- Units:   null means all. `since` is included, `until` is not: see stg_document_places for the dates of documents.
--          from_part and to_part, both included, number the parts of the tokens in the order of the corpus, from 0.
--          n_tokens, density, mean_value, std_value and max_value are those of feature_summary, but of the range alone;
--          max_value is null for a source. All are exact. Stored counts answer for every part whose documents (of the
--          source) are all in the range; values are read only of other parts.
-- Parameters: source text = null, since text = null, until text = null, from_part bigint = null,
--          to_part bigint = null, features bigint[] = null
-- Ask it:  which features are dense in the novels?  from summary_within('novels')
create or replace macro summary_within(
    source := null, since := null, until := null, from_part := null, to_part := null, features := null
) as table
with found as materialized (
    from within_stats(case when source is not null then [source] end, since, until, from_part, to_part, features)
),
firing as (
    select
        feature_id,
        sum(found.n_tokens)::bigint          as n_tokens,
        sum(found.sum_value)                 as sum_value,
        sum(found.sum_squares)               as sum_squares,
        peak_value(found.max_value)::double  as max_value
    from found
    group by feature_id
),
size as (
    select sum(found.n_tokens) filter (where feature_id is null) as n_encoded from found
),
counts as (
    select
        feature_id,
        coalesce(firing.n_tokens, 0)            as n_tokens,
        firing.sum_value / firing.n_tokens      as mean_value,
        firing.sum_squares / firing.n_tokens    as mean_square,
        firing.max_value
    from stg_feature_stats
    left join firing using (feature_id)
    where features is null or list_contains(features, feature_id)
)
select
    feature_id,
    feature_names.label,
    counts.n_tokens,
    counts.n_tokens / nullif(n_encoded, 0)                    as density,
    mean_value,
    case when mean_value is not null then sqrt(greatest(mean_square - pow(mean_value, 2), 0)) end as std_value,
    counts.max_value
from counts
left join feature_names using (feature_id)
cross join size
order by feature_id;
