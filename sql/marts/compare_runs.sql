-- For each feature of one run, the feature of another run that fires on most of the same tokens.
--
-- Grain:   one row per feature of run a, dead ones too.
-- Reads:   stg_feature_stats and stg_token_major of all runs side by side, stg_runs, jaccard_index
-- Units:   a and b are schema names from the view runs; both runs must be of the same tokens. match_id is the feature
--          of b with the largest Jaccard index (the lower number among equals), null if none fires with it: jaccard =
--          tokens at which both fire / tokens at which either fires. It is counted on about 16,000 evenly spaced tokens
--          that both runs encoded. Rates are exact shares of each run's tokens.
-- Parameters: a text, b text
-- Ask it:  which features did the larger SAE keep?  from compare_runs('small', 'large')
create or replace macro compare_runs(a, b) as table
with sizes as materialized (
    select schema_name, n_tokens, tokens_artefact, max(n_tokens) over () // 16384 | 1 as step
    from stg_runs
    where problem is null and schema_name in (a, b)
),
known as materialized (
    select case
        when (bool_or(schema_name = a) and bool_or(schema_name = b)) is distinct from true
            then error('a and b must be schema names of the view runs')
        when count(distinct tokens_artefact) > 1
            then error('a and b are runs of different tokens: a token of one is none of the other')
        else true
    end as are_known
    from sizes
),
sample_a as materialized (
    select token_id, feature_id from every_run.stg_token_major
    where run = a and token_id % (select any_value(step) from sizes) = 0
),
sample_b as materialized (
    select token_id, feature_id from every_run.stg_token_major
    where run = b and token_id % (select any_value(step) from sizes) = 0
),
ends as (
    select
        greatest((select min(token_id) from sample_a), (select min(token_id) from sample_b)) as first_id,
        least((select max(token_id) from sample_a), (select max(token_id) from sample_b))    as last_id
),
fired_a as materialized (
    select token_id, feature_id from sample_a cross join ends where token_id between first_id and last_id
),
fired_b as materialized (
    select token_id, feature_id from sample_b cross join ends where token_id between first_id and last_id
),
counts_a as (
    select feature_id, count(*) as n_fired from fired_a group by feature_id
),
counts_b as (
    select feature_id, count(*) as n_fired from fired_b group by feature_id
),
pairs as (
    select pair >> 32 as feature_id, pair & 4294967295 as match_id, n_both
    from (
        select (fired_a.feature_id::bigint << 32) + fired_b.feature_id as pair, count(*) as n_both
        from fired_a
        join fired_b using (token_id)
        group by pair
    )
),
matches as (
    select
        pairs.feature_id,
        pairs.match_id,
        jaccard_index(pairs.n_both, counts_a.n_fired, counts_b.n_fired) as jaccard
    from pairs
    join counts_a using (feature_id)
    join counts_b on counts_b.feature_id = pairs.match_id
),
best as (
    select feature_id, arg_max(match_id, (jaccard, -match_id)) as match_id, max(jaccard) as jaccard
    from matches
    group by feature_id
),
rates as (
    select run, feature_id, stats.n_tokens / sizes.n_tokens as rate
    from every_run.stg_feature_stats as stats
    join sizes on sizes.schema_name = stats.run
    where run in (a, b)
)
select
    of_a.feature_id,
    best.match_id,
    best.jaccard,
    of_a.rate              as rate_a,
    of_b.rate              as rate_b,
    of_a.rate - of_b.rate  as rate_difference
from rates as of_a
left join best on best.feature_id = of_a.feature_id
left join rates as of_b on of_b.feature_id = best.match_id and of_b.run = b
where of_a.run = a and (select are_known from known)
order by best.jaccard desc nulls last, of_a.feature_id;
