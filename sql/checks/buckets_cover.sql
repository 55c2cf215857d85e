-- In each part, exactly one file may hold a feature that fires, and no feature lies in two files.
--
-- Grain:   one row per (part, feature) with a wrong number of files.
-- Reads:   src_feature_major, src_feature_stats, src_shape
-- Units:   n_files counts the files whose folder names say that they may hold the feature. Files without a value are
--          left out; so are files of an earlier saeflow, whose names say nothing.
-- Ask it:  do the buckets of a part overlap, or leave a feature out?
with files as (
    select distinct filename, low, high from src_feature_major
),
said as materialized (
    select regexp_extract(filename, '^(.*)/feature_major', 1) as part, low, high
    from files
    where high < 9223372036854775807
),
covered as (
    select part, feature_id, count(*) as n_files
    from (
        select part, unnest(generate_series(low, least(high, n_features - 1))) as feature_id
        from said
        cross join src_shape
    )
    group by part, feature_id
),
fired as (
    select regexp_extract(filename, '^(.*)/feature_stats', 1) as part, feature_id, n_tokens
    from src_feature_stats
    where n_tokens > 0 and part in (select part from said)
)
select part, feature_id, coalesce(covered.n_files, 0) as n_files, fired.n_tokens
from covered
full join fired using (part, feature_id)
where coalesce(covered.n_files, 0) <> 1
order by part, feature_id;
