-- Features that fire together with a feature in a source, between two dates, or in a range of parts.
--
-- Grain:   one row per other feature that fires there at least once, the largest Jaccard index first.
-- Reads:   tokens_of_feature, stg_document_places, within_documents, within_stats, values_at, jaccard_index,
--          mutual_information
-- Units:   the columns are those of coactivation, but of the range alone: n_both, n_feature, n_other and N count tokens
--          of the range. The range is that of summary_within. All are exact. n_both is counted from the values at the
--          tokens where the feature fires, n_other as in summary_within: values of all features are read only of parts
--          with documents in and out of the range.
-- Parameters: feature bigint, source text = null, since text = null, until text = null, from_part bigint = null,
--          to_part bigint = null
-- Ask it:  what fires together with feature 12 in the novels?  from coactivation_within(12, 'novels')
create or replace macro coactivation_within(
    feature, source := null, since := null, until := null, from_part := null, to_part := null
) as table
with chosen as materialized (
    select document_id
    from within_documents(case when source is not null then [source] end, since, until, from_part, to_part)
),
firing as materialized (
    select token_id
    from (select token_id from tokens_of_feature(feature)) as fired
    asof join stg_document_places as places on fired.token_id >= places.first_token_id
    where document_id in (from chosen)
),
own as (
    select count(*) as n_feature from firing
),
counts as materialized (
    select feature_id as other_id, count(*) as n_both
    from values_at((select list(token_id) from firing))
    group by feature_id
),
sizes as materialized (
    select feature_id as other_id, sum(n_tokens)::bigint as n_other
    from within_stats(case when source is not null then [source] end, since, until, from_part, to_part, null)
    group by feature_id
),
total as (
    select sum(n_other) filter (where other_id is null) as n_encoded from sizes
)
select
    other_id,
    counts.n_both,
    own.n_feature,
    n_other,
    jaccard_index(counts.n_both, own.n_feature, n_other)                   as jaccard,
    mutual_information(counts.n_both, own.n_feature, n_other, n_encoded)   as pmi
from counts
join sizes using (other_id)
cross join own
cross join total
where other_id <> feature
order by jaccard desc, counts.n_both desc, other_id;
