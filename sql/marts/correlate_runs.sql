-- How alike the values of features of one run are to those of features of another: their correlation over all tokens.
--
-- Grain:   one row per pair of the lists, in their order.
-- Reads:   stg_runs, stg_feature_major (only the row groups of these features) and stg_tokens_in_blocks of all runs
--          side by side, jaccard_index
-- Units:   a and b are schema names from the view runs; both runs must be of the same tokens. The first of features is
--          paired with the first of matches, and so on. n_a and n_b count the tokens at which each fires, n_both those
--          at which both do, of the n_all tokens that both runs encoded. correlation is Pearson's over the n_all
--          tokens, 0 where a feature is silent; null if one of the two does not vary.
-- Parameters: a text, b text, features bigint[], matches bigint[]
-- Ask it:  is feature 0 of one run feature 1 of another?  from correlate_runs('large', 'small', [0], [1])
create or replace macro correlate_runs(a, b, features, matches) as table
with known as materialized (
    select case
        when (bool_or(schema_name = a) and bool_or(schema_name = b)) is distinct from true
            then error('a and b must be schema names of the view runs')
        when count(distinct tokens_artefact) > 1
            then error('a and b are runs of different tokens: a token of one is none of the other')
        when len(features) is distinct from len(matches) then error('features and matches must be lists of one length')
        else true
    end as are_known
    from stg_runs
    where problem is null and schema_name in (a, b)
),
pairs as materialized (
    select
        unnest(range(len(features))) as place,
        unnest(features)::bigint     as feature_id,
        unnest(matches)::bigint      as match_id
),
encoded as materialized (
    select block, of_a.tokens & of_b.tokens as tokens
    from (from every_run.stg_tokens_in_blocks where run = a) as of_a
    join (from every_run.stg_tokens_in_blocks where run = b) as of_b using (block)
),
size as (
    select coalesce(sum(bit_count(tokens)), 0)::double as n_all from encoded
),
of_a as materialized (
    select feature_id, token_id, value::double as value
    from every_run.stg_feature_major
    join encoded on token_id // 120 = block
    where run = a
        and feature_id in (select feature_id from pairs)
        and low <= list_max(features::bigint[])
        and high >= list_min(features::bigint[])
        and tokens >> (token_id % 120)::int & 1 = 1
),
of_b as materialized (
    select feature_id as match_id, token_id, value::double as value
    from every_run.stg_feature_major
    join encoded on token_id // 120 = block
    where run = b
        and feature_id in (select match_id from pairs)
        and low <= list_max(matches::bigint[])
        and high >= list_min(matches::bigint[])
        and tokens >> (token_id % 120)::int & 1 = 1
),
sums_a as (
    select feature_id, count(*) as n_a, sum(value) as sum_a, sum(value * value) as squares_a
    from of_a
    group by feature_id
),
sums_b as (
    select match_id, count(*) as n_b, sum(value) as sum_b, sum(value * value) as squares_b
    from of_b
    group by match_id
),
products as (
    select feature_id, match_id, count(*) as n_both, sum(of_a.value * of_b.value) as sum_both
    from of_a
    join (select distinct feature_id, match_id from pairs) using (feature_id)
    join of_b using (match_id, token_id)
    group by feature_id, match_id
),
sums as (
    select
        place,
        feature_id,
        match_id,
        coalesce(n_a, 0)       as n_a,
        coalesce(n_b, 0)       as n_b,
        coalesce(n_both, 0)    as n_both,
        coalesce(sum_both, 0) - coalesce(sum_a * sum_b, 0) / nullif(n_all, 0) as together,
        (squares_a - sum_a * sum_a / n_all) * (squares_b - sum_b * sum_b / n_all) as apart,
        n_all::bigint          as n_all
    from pairs
    left join sums_a using (feature_id)
    left join sums_b using (match_id)
    left join products using (feature_id, match_id)
    cross join size
    where (select are_known from known)
)
select
    feature_id,
    match_id,
    n_a,
    n_b,
    n_both,
    n_all,
    jaccard_index(n_both, n_a, n_b)                                       as jaccard,
    case when apart > 0 then greatest(least(together / sqrt(apart), 1), -1) end as correlation
from sums
order by place;
