-- Every feature has exactly one row of statistics in each part, and no other feature has one.
--
-- Grain:   one row per (file, feature) with a wrong number of rows.
-- Reads:   src_feature_stats, stg_runs
-- Units:   n_rows should be 1 for a feature of the dictionary, and 0 for any other.
-- Ask it:  is a feature missing or counted twice?
with files as (
    select distinct filename from src_feature_stats
),
dictionary as (
    select unnest(generate_series(0, (facts ->> 'n_features')::bigint - 1)) as feature_id
    from stg_runs
    where is_current
),
expected as (
    select filename, feature_id from files cross join dictionary
),
found as (
    select filename, feature_id, count(*) as n_rows from src_feature_stats group by filename, feature_id
)
select filename, feature_id, coalesce(found.n_rows, 0) as n_rows, expected.feature_id is not null as is_in_dictionary
from expected
full join found using (filename, feature_id)
where found.n_rows is distinct from 1 or expected.feature_id is null
order by filename, feature_id;
