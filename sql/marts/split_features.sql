-- Which features of another run share out the tokens of a feature: how a larger dictionary splits it.
--
-- Grain:   one row per feature of the other run that fires mainly where the feature fires, the largest share first;
--          ties by feature; at most n.
-- Reads:   stg_feature_major, stg_tokens_in_blocks, stg_runs; stg_feature_major, stg_token_major and
--          stg_tokens_in_blocks of all runs side by side; jaccard_index
-- Units:   other_run is a schema name of the view runs; both runs must be of the same tokens. Tokens that both runs
--          encoded are counted, exactly: n_feature and n_other those at which each fires, n_both those at which both
--          do. share_inside = n_both / n_other, at least min_inside; share_of_feature = n_both / n_feature. covered is
--          the share of the feature's tokens at which this row's feature or one of a row above fires. jaccard = n_both
--          / (n_feature + n_other - n_both). cosine is that of the two decoder rows; saeflow computes it in the shell
--          and in Python, elsewhere it is null.
-- Parameters: feature bigint, other_run text, n bigint = 20, min_inside double = 0.5
-- Ask it:  into what does a larger SAE split feature 0?  from split_features(0, 'small')
create or replace macro split_features(feature, other_run, n := 20, min_inside := 0.5, cosines := null) as table
with known as materialized (
    select case
        when (bool_or(schema_name = other_run)) is distinct from true
            then error('other_run must be a schema name of the view runs')
        when count(distinct tokens_artefact) > 1
            then error('these are runs of different tokens: a token of one is none of the other')
        else true
    end as are_known
    from stg_runs
    where problem is null and (schema_name = other_run or is_current)
),
encoded as materialized (
    select block, mine.tokens & theirs.tokens as tokens
    from stg_tokens_in_blocks as mine
    join (from every_run.stg_tokens_in_blocks where run = other_run) as theirs using (block)
),
parent as materialized (
    select token_id
    from stg_feature_major
    join encoded on token_id // 120 = block
    where feature_id = feature
        and feature between low and high
        and tokens >> (token_id % 120)::int & 1 = 1
        and (select are_known from known)
),
meeting as materialized (
    select token_id, feature_id as other_id
    from every_run.stg_token_major
    where run = other_run and token_id in (select token_id from parent)
),
both_fire as materialized (
    select other_id, count(*) as n_both from meeting group by other_id
),
others as (
    select feature_id as other_id, count(*) as n_other
    from every_run.stg_feature_major
    join encoded on token_id // 120 = block
    where run = other_run
        and feature_id in (select other_id from both_fire)
        and tokens >> (token_id % 120)::int & 1 = 1
    group by feature_id
),
children as materialized (
    select other_id, n_both, n_other, row_number() over (order by n_both desc, other_id) as place
    from both_fire
    join others using (other_id)
    where n_both / n_other >= min_inside
),
reached as (
    select place, sum(count(*)) over (order by place) as n_covered
    from (select token_id, min(place) as place from meeting join children using (other_id) group by token_id)
    group by place
),
size as (
    select count(*) as n_feature from parent
),
directions as (
    select feature_id as other_id, cosine from (
        select unnest(cosines::struct(feature_id bigint, cosine double)[], recursive := true)
    )
)
select
    other_id,
    n_feature,
    n_other,
    n_both,
    n_both / n_other                             as share_inside,
    n_both / n_feature                           as share_of_feature,
    (select max(n_covered) from reached where reached.place <= children.place) / n_feature as covered,
    jaccard_index(n_both, n_feature, n_other)    as jaccard,
    directions.cosine
from children
cross join size
left join directions using (other_id)
order by n_both desc, other_id
limit n;
