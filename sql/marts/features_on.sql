-- Which features fire on a text, wherever the corpus has it.
--
-- Grain:   one row per feature that fires on a token of the text, at most n, the largest score first; ties by feature.
-- Reads:   tokens_of_text, is_encoded, values_at, stg_feature_stats, stg_size, feature_names, telling_score,
--          strength, usual_strength
-- Units:   the text's tokens are those that tokens_of_text finds, whatever the case, if they were encoded. n_tokens
--          counts those at which the feature fires; share is their share of the text's tokens. density is the feature's
--          share of all encoded tokens, and lift = share / density. strength is the feature's largest value in each
--          place that has the text, averaged over all these places, in multiples of its mean value when it fires; in a
--          signed run its largest magnitude, in multiples of the root mean square.
--          score = strength * -log2(density), so that a feature that fires everywhere comes last.
-- Parameters: text text, n bigint = 20
-- Ask it:  which features mean Jerusalem?  from features_on('Jerusalem')
create or replace macro features_on(text, n := 20) as table
with found as materialized (
    select run_id, token_id from tokens_of_text(text) where is_encoded(token_id, vocab_id)
),
sizes as materialized (
    select count(distinct token_id)::double as n_found, count(distinct run_id)::double as n_places from found
),
firing as materialized (
    select token_id, feature_id, value from values_at((select list(distinct token_id) from found))
),
counts as (
    select feature_id, count(*) as n_tokens from firing group by feature_id
),
peaks as (
    select feature_id, sum(peak) as sum_peak
    from (
        select run_id, feature_id, max(strength(value))::double as peak
        from found
        join firing using (token_id)
        group by all
    )
    group by feature_id
),
shares as (
    select
        feature_id,
        counts.n_tokens,
        counts.n_tokens / n_found                                               as share,
        stats.n_tokens / n_encoded_tokens                                       as density,
        counts.n_tokens * n_encoded_tokens::double / (stats.n_tokens * n_found) as lift,
        peaks.sum_peak / n_places
            / usual_strength(stats.n_tokens, stats.sum_value, stats.sum_squares) as strength
    from counts
    join peaks using (feature_id)
    join stg_feature_stats as stats using (feature_id)
    cross join sizes
    cross join stg_size
)
select
    feature_id,
    feature_names.label,
    shares.n_tokens,
    share,
    density,
    lift,
    strength,
    telling_score(strength, density) as score
from shares
left join feature_names using (feature_id)
order by score desc, feature_id
limit n;
