-- How often specific features take over where the general feature of a class should fire: feature absorption.
--
-- Grain:   one row per feature that absorbs, most tokens first; ties by feature. If none does, one row without it.
-- Reads:   stg_tokens_encoded, stg_token_major, stg_feature_stats, stg_size, stg_similar, feature_names, share_low,
--          share_high, usual_strength
-- Units:   the class is given by sql or tokens, as in features_of_selection. generals are its general features; if the
--          list is empty, the feature that features_of_selection names first. n_class counts the class's encoded
--          tokens, n_silent those at which no general feature fires. Every feature that fires there pulls towards a
--          general feature by pull = value * cosine of their directions / the general one's mean value when it fires.
--          The token is absorbed if the feature with the largest pull is a specific one, has a cosine of at least
--          min_cosine, and pulls at least min_pull. A feature is specific if at least min_precision of its firing is
--          inside the class and it fires on fewer of the class's tokens than the general ones. A cosine is known if
--          one of the two is among the 50 nearest of the other. n_absorbed and share of n_class are those of one
--          feature, all_absorbed and absorption_rate those of all. After Chanin et al. 2024 (arXiv 2409.14507), who
--          use the direction of a probe in the place of the general feature's.
-- Parameters: sql text = '', tokens bigint[] = [], generals bigint[] = [], min_precision double = 0.9,
--          min_cosine double = 0.1, min_pull double = 0.25
-- Ask it:  which features take over in this class?  from absorption(tokens := [0, 1, 5, 7])
create or replace macro absorption(
    sql := '',
    tokens := [],
    generals := [],
    min_precision := 0.9,
    min_cosine := 0.1,
    min_pull := 0.25,
    chosen := null
) as table
with wanted as materialized (
    select distinct unnest(
        case
            when coalesce(sql, '') != '' and chosen is null
                then error('absorption runs a select: ask it by `saeflow ask`, or in Python')
            else coalesce(chosen, tokens)
        end
    )::bigint as token_id
),
members as materialized (
    select token_id from stg_tokens_encoded where token_id in (select token_id from wanted)
),
size as materialized (
    select count(*) as n_class from members
),
firing as materialized (
    select token_id, feature_id, value::double as value
    from stg_token_major
    where token_id in (select token_id from members)
),
inside as materialized (
    select
        feature_id,
        n_inside,
        n_inside / stats.n_tokens      as of_firing,
        share_low(n_inside, n_class)   as low,
        share_high(stats.n_tokens - n_inside, n_encoded_tokens - n_class) as high
    from (select feature_id, count(*) as n_inside from firing group by feature_id)
    join stg_feature_stats as stats using (feature_id)
    cross join size
    cross join stg_size
),
general as materialized (
    select
        feature_id as general_id,
        usual_strength(nullif(stats.n_tokens, 0), stats.sum_value, stats.sum_squares) as usual
    from stg_feature_stats as stats
    where case
        when len(generals) > 0 then list_contains(generals, feature_id)
        else feature_id = (select first(feature_id order by low * log2(low / high) desc, feature_id) from inside)
    end
),
answered as materialized (
    select distinct token_id from firing where feature_id in (select general_id from general)
),
near as materialized (
    select feature_id, general_id, usual, max(cosine)::double as cosine
    from (
        select other_id as feature_id, feature_id as general_id, cosine from stg_similar
        union all
        select feature_id, other_id, cosine from stg_similar
    )
    join general using (general_id)
    where feature_id not in (select general_id from general)
    group by feature_id, general_id, usual
),
pulls as (
    select token_id, feature_id, cosine, value * cosine / usual as pull
    from firing
    join near using (feature_id)
    where token_id not in (select token_id from answered)
    qualify row_number() over (partition by token_id order by pull desc, feature_id, general_id) = 1
),
absorbed as (
    select feature_id, count(*) as n_absorbed, max(cosine) as cosine, any_value(of_firing) as of_firing
    from pulls
    join inside using (feature_id)
    where pull >= min_pull
        and cosine >= min_cosine
        and of_firing >= min_precision
        and n_inside < (select count(*) from answered)
    group by feature_id
),
totals as (
    select
        n_class,
        n_class - (select count(*) from answered)                      as n_silent,
        (select coalesce(sum(n_absorbed), 0)::bigint from absorbed)    as all_absorbed,
        (select list(general_id order by general_id) from general)     as of_features
    from size
)
select
    of_features                           as generals,
    n_class,
    n_silent,
    all_absorbed,
    all_absorbed / nullif(n_class, 0)     as absorption_rate,
    absorbed.feature_id,
    feature_names.label,
    absorbed.n_absorbed,
    absorbed.n_absorbed / nullif(n_class, 0) as share,
    absorbed.of_firing                    as "precision",
    absorbed.cosine
from totals
left join absorbed on true
left join feature_names on feature_names.feature_id = absorbed.feature_id
order by absorbed.n_absorbed desc nulls last, absorbed.feature_id;
