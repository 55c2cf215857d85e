-- Which features fire on a text, counted in a sample of documents: a quick estimate of features_on.
--
-- Grain:   one row per feature that fires there on a token of the text, at most n, the largest score_low first.
-- Reads:   tokens_of_text, is_encoded, stg_sample_places, stg_sample, stg_feature_stats, stg_size, feature_names,
--          every_part_has_sample, ratio_squares, effective_size, share_low, share_high, t_quantile, telling_score,
--          strength, usual_strength
-- Units:   the columns are those of features_on, whose figures they estimate; density is exact. 95 of 100 samples have
--          the true n_tokens from low to high, and the true score from score_low to score_high. The sample is that of
--          approximate_coactivation: n_seen counts its tokens of the text at which the feature fires, n_documents its
--          documents that have the text. share is that of the sample, and n_tokens = share * (tokens of the text in
--          the corpus). Its interval is that of a share (Wilson 1927) with the effective_size of so many documents.
--          That of score is score -+ t_quantile standard errors of a ratio estimator whose clusters are documents
--          (Cochran 1977, chapter 6): both ends are null if a single document has the text. Both intervals are those
--          of a feature chosen beforehand.
-- Parameters: text text, n bigint = 20
-- Ask it:  which features mean Jerusalem, about?  from approximate_features_on('Jerusalem')
create or replace macro approximate_features_on(text, n := 20) as table
with every as materialized (
    select run_id, token_id
    from tokens_of_text(text)
    where is_encoded(token_id, vocab_id) and every_part_has_sample()
),
found as materialized (
    select run_id, every.token_id, places.first_token_id as owner
    from every
    asof join stg_sample_places as places on every.token_id >= places.first_token_id
    where every.token_id < places.end_token_id
),
by_document as materialized (
    select owner, count(distinct token_id)::double as n_tokens, count(distinct run_id)::double as n_places
    from found
    group by owner
),
own as materialized (
    select
        count(*)                                      as n_documents,
        sum(by_document.n_tokens)                       as n_found,
        sum(by_document.n_places)                       as n_places,
        sum(pow(by_document.n_tokens, 2))               as token_squares,
        sum(pow(by_document.n_places, 2))               as place_squares,
        (select count(distinct token_id) from every)  as n_everywhere
    from by_document
),
firing as materialized (
    select token_id, feature_id, value from stg_sample where token_id in (select token_id from found)
),
counts as (
    select feature_id, owner, count(*) as n_tokens
    from firing
    join (select distinct token_id, owner from found) as mine using (token_id)
    group by all
),
peaks as (
    select feature_id, owner, sum(peak) as peak
    from (
        select run_id, owner, feature_id, max(strength(value))::double as peak
        from found
        join firing using (token_id)
        group by all
    )
    group by all
),
sums as materialized (
    select
        feature_id,
        sum(counts.n_tokens)::bigint   as n_hits,
        sum(peaks.peak)                as sum_peak,
        sum(pow(counts.n_tokens, 2))   as hit_squares,
        sum(counts.n_tokens * by_document.n_tokens) as hits_by_tokens,
        sum(pow(peaks.peak, 2))        as peak_squares,
        sum(peaks.peak * by_document.n_places) as peaks_by_places
    from counts
    join peaks using (feature_id, owner)
    join by_document using (owner)
    group by feature_id
),
-- The sum over all documents of (hits - share * tokens)^2, where most have no hit; and the same of peaks.
shares as (
    select
        feature_id,
        n_hits,
        n_hits / own.n_found         as share,
        sum_peak / own.n_places      as peak,
        effective_size(
            share, ratio_squares(share, hit_squares, hits_by_tokens, token_squares), own.n_found, n_documents
        )                            as size,
        t_quantile(n_documents) * sqrt(
            n_documents / (n_documents - 1)
            * ratio_squares(peak, peak_squares, peaks_by_places, place_squares)
        ) / own.n_places             as peak_error,
        n_everywhere,
        n_documents
    from sums
    cross join own
),
scored as (
    select
        feature_id,
        n_hits,
        n_documents,
        share,
        n_everywhere * share                                       as estimate,
        n_everywhere * share_low(share * size, size)               as low,
        n_everywhere * share_high(share * size, size)              as high,
        stats.n_tokens                                             as n_feature,
        stats.n_tokens / n_encoded_tokens                          as density,
        usual_strength(stats.n_tokens, stats.sum_value, stats.sum_squares) as usual,
        peak,
        peak_error
    from shares
    join stg_feature_stats as stats using (feature_id)
    cross join stg_size
)
select
    feature_id,
    feature_names.label,
    round(least(estimate, n_feature))::bigint                          as n_tokens,
    least(greatest(floor(low), n_hits), n_feature)::bigint             as low,
    least(ceil(high), n_feature)::bigint                               as high,
    share,
    density,
    share / density                                                    as lift,
    peak / usual                                                       as strength,
    telling_score(peak / usual, density)                               as score,
    telling_score(if(peak_error is null, null, greatest(peak - peak_error, 0)) / usual, density) as score_low,
    telling_score((peak + peak_error) / usual, density)                as score_high,
    n_hits                                                             as n_seen,
    n_documents
from scored
left join feature_names using (feature_id)
order by score_low desc, score desc, feature_id
limit n;
