-- What tells some tokens from the rest, counted in a sample of documents: a quick estimate of features_of_selection.
--
-- Grain:   one row per feature that fires there on a chosen token, at most n, the largest score_low first.
-- Reads:   stg_tokens_encoded, stg_sample_places, stg_sample, stg_feature_stats, stg_size, feature_names,
--          every_part_has_sample, ratio_squares, effective_size, share_low, share_high, telling_bits
-- Units:   the columns are those of features_of_selection, whose figures they estimate. 95 of 100 samples have the true
--          n_tokens from low to high; rest_share, lift and the scores follow from these. The sample is that of
--          approximate_coactivation: n_seen counts its chosen tokens at which the feature fires, n_documents its
--          documents that have chosen tokens. share is that of the sample, n_tokens = share * (chosen tokens). The
--          interval is that of a share (Wilson 1927) with the effective_size of so many documents, for a feature chosen
--          beforehand. mean_value is that of the sample.
-- Parameters: sql text = '', tokens bigint[] = [], n bigint = 20
-- Ask it:  what have these tokens in common, about?  from approximate_features_of_selection(tokens := [1, 2, 3])
create or replace macro approximate_features_of_selection(sql := '', tokens := [], n := 20, chosen := null) as table
with wanted as materialized (
    select distinct unnest(
        case
            when coalesce(sql, '') != '' and chosen is null
                then error('approximate_features_of_selection runs a select: ask it by `saeflow ask`, or in Python')
            else coalesce(chosen, tokens)
        end
    )::bigint as token_id
),
mine as materialized (
    select token_id
    from stg_tokens_encoded
    where token_id in (select token_id from wanted) and every_part_has_sample()
),
sizes as materialized (
    select count(*) as n_mine, any_value(n_encoded_tokens) - count(*) as n_others
    from mine
    cross join stg_size
),
found as materialized (
    select mine.token_id, places.first_token_id as owner
    from mine
    asof join stg_sample_places as places on mine.token_id >= places.first_token_id
    where mine.token_id < places.end_token_id
),
by_document as materialized (
    select owner, count(*)::double as n_chosen from found group by owner
),
own as materialized (
    select count(*) as n_documents, sum(n_chosen) as n_found, sum(pow(n_chosen, 2)) as squares from by_document
),
counts as (
    select feature_id, owner, count(*) as n_hits, sum(value::double) as sum_value
    from stg_sample
    join found using (token_id)
    group by all
),
sums as (
    select
        feature_id,
        sum(counts.n_hits)::bigint       as n_seen,
        sum(counts.sum_value)            as sum_value,
        sum(pow(counts.n_hits, 2))       as hit_squares,
        sum(counts.n_hits * n_chosen)    as hits_by_tokens
    from counts
    join by_document using (owner)
    group by feature_id
),
-- The sum over all documents of (hits - share * tokens)^2, where most have no hit.
shares as (
    select
        feature_id,
        n_seen,
        n_documents,
        sums.sum_value / n_seen      as mean_value,
        n_seen / n_found             as share,
        effective_size(
            share, ratio_squares(share, hit_squares, hits_by_tokens, squares), n_found, n_documents
        )                            as size
    from sums
    cross join own
),
ends as (
    select
        *,
        least(stats.n_tokens, n_mine + n_others)                                               as n_feature,
        greatest(n_seen, n_feature - n_others)                                                 as fewest,
        least(greatest(round(n_mine * share), fewest), n_feature)::bigint                      as estimate,
        least(greatest(floor(n_mine * share_low(share * size, size)), fewest), n_feature)::bigint as low,
        least(greatest(ceil(n_mine * share_high(share * size, size)), fewest), n_feature)::bigint as high
    from shares
    join stg_feature_stats as stats using (feature_id)
    cross join sizes
),
scored as (
    select
        *,
        n_feature - estimate                                           as n_rest,
        telling_bits(estimate, n_mine, n_feature - estimate, n_others) as score,
        telling_bits(low, n_mine, n_feature - low, n_others)           as at_low,
        telling_bits(high, n_mine, n_feature - high, n_others)         as at_high
    from ends
)
select
    feature_id,
    feature_names.label,
    estimate                                        as n_tokens,
    low,
    high,
    share,
    n_rest,
    n_rest / nullif(n_others, 0)                    as rest_share,
    share / nullif(n_rest / nullif(n_others, 0), 0) as lift,
    mean_value,
    score,
    least(at_low, score, at_high)                   as score_low,
    greatest(at_low, score, at_high)                as score_high,
    n_seen,
    n_documents
from scored
left join feature_names using (feature_id)
order by score_low desc, score desc, feature_id
limit n;
