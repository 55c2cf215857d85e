-- The stored counts of tokens at which two features fire together are right. A large run is checked by a sample of
-- features with about 250,000 values.
--
-- Grain:   one row per stored pair with a wrong count.
-- Reads:   stg_coactivation, stg_feature_major, stg_token_major, stg_feature_stats, src_feature_stats
-- Units:   n_… count tokens. The stored count may be lower if the run has several parts, and must be equal if it has
--          one.
-- Ask it:  do the stored pairs really fire together?
with step as (
    select 1 + sum(n_tokens)::bigint // 250000 as features from stg_feature_stats
),
stored as materialized (
    select feature_id, other_id, n_both from stg_coactivation where feature_id % (select features from step) = 0
),
firing as materialized (
    select feature_id, token_id from stg_feature_major where feature_id in (select feature_id from stored)
),
recount as materialized (
    select firing.feature_id, others.feature_id as other_id, count(*) as n_both
    from stg_token_major as others
    join firing using (token_id)
    where firing.feature_id <> others.feature_id
    group by all
)
select feature_id, other_id, stored.n_both as n_stored, coalesce(recount.n_both, 0) as n_counted
from stored
left join recount using (feature_id, other_id)
where stored.n_both > coalesce(recount.n_both, 0)
    or stored.n_both < 1
    or (stored.n_both <> recount.n_both and (select count(distinct filename) from src_feature_stats) = 1)
order by feature_id, other_id;
