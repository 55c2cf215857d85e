-- Both sort orders hold the same rows.
--
-- Grain:   one row per feature whose rows differ between the orders.
-- Reads:   stg_feature_major, stg_token_major
-- Units:   n_… count rows; the sums of hashes do not depend on the order of rows.
-- Ask it:  is a (feature, token, value) in one order and not in the other?
with by_feature as (
    select feature_id, count(*) as n_rows, sum(hash(token_id, value)::hugeint) as hash_sum
    from stg_feature_major
    group by feature_id
),
by_token as (
    select feature_id, count(*) as n_rows, sum(hash(token_id, value)::hugeint) as hash_sum
    from stg_token_major
    group by feature_id
)
select
    feature_id,
    coalesce(by_feature.n_rows, 0) as n_feature_major,
    coalesce(by_token.n_rows, 0)   as n_token_major
from by_feature
full join by_token using (feature_id)
where (by_feature.n_rows, by_feature.hash_sum) is distinct from (by_token.n_rows, by_token.hash_sum)
order by feature_id;
