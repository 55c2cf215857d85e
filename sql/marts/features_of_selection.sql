-- What tells some tokens from the rest: five examples, the documents of a query, or a million tokens.
--
-- Grain:   one row per feature that fires on a chosen token, the largest score first; ties by feature; at most n.
-- Reads:   stg_tokens_encoded, values_at, stg_feature_stats, stg_size, feature_names, telling_bits
-- Units:   sql is a select that gives token_id, document_id or key (of documents); saeflow runs it in the shell and in
--          Python. Elsewhere give tokens. Chosen tokens that were not encoded do not count. n_tokens counts the chosen
--          tokens at which the feature fires and share is their share; n_rest and rest_share are those of all other
--          encoded tokens. lift = share / rest_share, null if rest_share is 0. mean_value is that of the feature's
--          values on chosen tokens, in the units of the activations. score = low * log2(low / high), in bits: low is
--          the lower end of the 95% interval of share, high the upper end of that of rest_share (Wilson 1927). A
--          feature that fires as often elsewhere scores below 0.
-- Parameters: sql text = '', tokens bigint[] = [], n bigint = 20
-- Ask it:  what have these tokens in common?  from features_of_selection(tokens := [1, 2, 3])
create or replace macro features_of_selection(sql := '', tokens := [], n := 20, chosen := null) as table
with wanted as materialized (
    select distinct unnest(
        case
            when coalesce(sql, '') != '' and chosen is null
                then error('features_of_selection runs a select: ask it by `saeflow ask`, or in Python')
            else coalesce(chosen, tokens)
        end
    )::bigint as token_id
),
mine as materialized (
    select token_id from stg_tokens_encoded where token_id in (select token_id from wanted)
),
sizes as materialized (
    select count(*) as n_mine, any_value(n_encoded_tokens) - count(*) as n_others
    from mine
    cross join stg_size
),
counts as (
    select feature_id, count(*) as n_tokens, avg(value::double) as mean_value
    from values_at((select list(token_id) from mine))
    group by feature_id
),
shares as (
    select
        feature_id,
        counts.n_tokens,
        stats.n_tokens - counts.n_tokens as n_rest,
        counts.mean_value,
        n_mine,
        n_others
    from counts
    join stg_feature_stats as stats using (feature_id)
    cross join sizes
)
select
    feature_id,
    feature_names.label,
    n_tokens,
    n_tokens / n_mine                                            as share,
    n_rest,
    n_rest / nullif(n_others, 0)                                 as rest_share,
    (n_tokens / n_mine) / nullif(n_rest / nullif(n_others, 0), 0) as lift,
    mean_value,
    telling_bits(n_tokens, n_mine, n_rest, n_others)          as score
from shares
left join feature_names using (feature_id)
order by score desc, feature_id
limit n;
