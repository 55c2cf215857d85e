-- For each feature of one run, the feature of another run that fires on most of the same tokens.
--
-- Grain:   one row per feature of run a, dead ones too, the largest Jaccard index first; ties by feature.
-- Reads:   stg_feature_stats, stg_token_major and stg_tokens_in_blocks of all runs side by side, stg_runs,
--          jaccard_index
-- Units:   a and b are schema names from the view runs; both runs must be of the same tokens. match_id is the feature
--          of b with the largest Jaccard index (the lower number among equals): jaccard = n_both / (n_a + n_b -
--          n_both), counted exactly over the tokens that both runs encoded. Features that fire on fewer than min_tokens
--          of them are not matched (null), because a few tokens agree by chance. Up to eight features of b are counted:
--          those that are nearest on 1,024 evenly spread tokens of the feature, within 0.1 (three standard errors) of
--          the best. Rates are exact shares of each run's tokens.
-- Parameters: a text, b text, min_tokens bigint = 10
-- Ask it:  which features did the larger SAE keep?  from compare_runs('small', 'large')
create or replace macro compare_runs(a, b, min_tokens := 10) as table
with sizes as materialized (
    select schema_name, n_tokens, tokens_artefact
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
encoded as materialized (
    select block, of_a.tokens & of_b.tokens as tokens
    from (from every_run.stg_tokens_in_blocks where run = a) as of_a
    join (from every_run.stg_tokens_in_blocks where run = b) as of_b using (block)
),
fired_a as not materialized (
    select token_id, feature_id
    from every_run.stg_token_major
    join encoded on token_id // 120 = block
    where run = a and tokens >> (token_id % 120)::int & 1 = 1
),
counts_a as materialized (
    from (select feature_id, count(*) as n_a from fired_a group by feature_id) where n_a >= min_tokens
),
counts_b as materialized (
    from (
        select feature_id as match_id, count(*) as n_b
        from every_run.stg_token_major
        join encoded on token_id // 120 = block
        where run = b and tokens >> (token_id % 120)::int & 1 = 1
        group by feature_id
    )
    where n_b >= min_tokens
),
-- Multiples of a large odd number modulo a power of two are spread evenly (Weyl 1916).
sample as materialized (
    select token_id, feature_id, n_a, count(*) over (partition by feature_id) as n_sample
    from fired_a
    join counts_a using (feature_id)
    where ((token_id & 2147483647) * 1640531527 & 2147483647) < 1024 * 2147483648.0 / n_a
),
near as (
    select feature_id, match_id, n_a, n_b, least(n_a * n_hits / n_sample, n_b) as n_both
    from (
        select
            sample.feature_id,
            of_b.feature_id     as match_id,
            any_value(n_a)      as n_a,
            any_value(n_sample) as n_sample,
            count(*)            as n_hits
        from sample
        join every_run.stg_token_major as of_b using (token_id)
        where of_b.run = b
        group by sample.feature_id, match_id
    )
    join counts_b using (match_id)
),
candidates as materialized (
    select feature_id, match_id, n_a, n_b
    from (
        select *, jaccard_index(n_both, n_a, n_b) as jaccard from near
        qualify row_number() over (partition by feature_id order by jaccard desc, match_id) <= 8
    )
    qualify jaccard >= max(jaccard) over (partition by feature_id) - 0.1
),
-- A feature that fires in a text fires there often, so there are an eighth as many blocks as values.
blocks_a as (
    select token_id // 120 as block, feature_id, bit_or(1::hugeint << (token_id % 120)::int) as fires
    from every_run.stg_token_major
    where run = a
    group by block, feature_id
),
blocks_b as (
    select token_id // 120 as block, feature_id as match_id, bit_or(1::hugeint << (token_id % 120)::int) as fires
    from every_run.stg_token_major
    where run = b
    group by block, match_id
),
matches as (
    select
        feature_id,
        match_id,
        any_value(n_a)                                          as n_a,
        any_value(n_b)                                          as n_b,
        sum(bit_count(blocks_a.fires & blocks_b.fires))::bigint as n_both
    from blocks_a
    join candidates using (feature_id)
    join blocks_b using (block, match_id)
    group by feature_id, match_id
),
best as (
    select *, jaccard_index(n_both, n_a, n_b) as jaccard
    from matches
    qualify row_number() over (partition by feature_id order by jaccard desc, match_id) = 1
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
    best.n_both,
    best.n_a,
    best.n_b,
    of_a.rate              as rate_a,
    of_b.rate              as rate_b,
    of_a.rate - of_b.rate  as rate_difference
from rates as of_a
left join best on best.feature_id = of_a.feature_id
left join rates as of_b on of_b.feature_id = best.match_id and of_b.run = b
where of_a.run = a and (select are_known from known)
order by best.jaccard desc nulls last, of_a.feature_id;
