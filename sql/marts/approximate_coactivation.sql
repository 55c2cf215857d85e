-- Features that fire together with a feature, counted in a sample of documents: a quick estimate of coactivation.
--
-- Grain:   one row per other feature that fires there at least once, the largest jaccard_low first; at most n.
-- Reads:   stg_sample, stg_sample_documents, stg_feature_stats, every_part_has_sample, no_value_is_hidden,
--          effective_size, share_low, share_high, jaccard_index
-- Units:   n_both estimates the tokens at which both fire; 95 of 100 samples have the true number from low to high.
--          jaccard, jaccard_low and jaccard_high follow from these. The sample is a 64th of the documents, those of
--          is_sampled: n_seen counts its tokens at which both fire, n_documents its documents in which the feature
--          fires. n_both = n_feature * n_seen / (tokens of the sample at which the feature fires): a ratio estimate,
--          since n_feature and n_other are exact. The interval is that of a share (Wilson 1927) with the
--          effective_size of so many documents. It holds for a pair that you chose beforehand. A pair that is listed
--          because it is frequent in the sample is often less frequent elsewhere. A pair that never fires together in
--          the sample has no row.
-- Parameters: feature bigint, n bigint = 20
-- Ask it:  what fires with feature 12, about?  from approximate_coactivation(12)
create or replace macro approximate_coactivation(feature, n := 20) as table
with firing as materialized (
    select mine.token_id, places.first_token_id as owner
    from (select token_id from stg_sample where feature_id = feature) as mine
    asof join stg_sample_documents as places on mine.token_id >= places.first_token_id
),
seen as materialized (
    select owner, count(*) as n_tokens from firing group by owner
),
own as materialized (
    select sum(seen.n_tokens)::bigint as n_seen, count(*) as n_documents, sum(pow(seen.n_tokens, 2)) as squares
    from seen
    having every_part_has_sample() and no_value_is_hidden()
),
counts as (
    select feature_id as other_id, count(*) as n_both
    from stg_sample
    where token_id in (select token_id from firing) and feature_id <> feature
    group by feature_id
),
shares as materialized (
    select
        other_id,
        counts.n_both                 as n_hits,
        counts.n_both / own.n_seen    as share,
        mine.n_tokens                 as n_feature,
        others.n_tokens               as n_other,
        least(mine.n_tokens * share, others.n_tokens)               as estimate,
        jaccard_index(estimate, mine.n_tokens, others.n_tokens)     as jaccard
    from counts
    cross join own
    join stg_feature_stats as mine on mine.feature_id = feature
    join stg_feature_stats as others on others.feature_id = other_id
    -- Few tokens say little: candidates are compared by what is sure of them.
    order by
        jaccard_index(mine.n_tokens * share_low(counts.n_both, own.n_seen), mine.n_tokens, others.n_tokens) desc,
        counts.n_both desc,
        other_id
    limit n
),
by_document as (
    select values.feature_id as other_id, firing.owner, count(*) as n_both
    from stg_sample as values
    join firing using (token_id)
    where values.feature_id in (select other_id from shares)
    group by all
),
spread as (
    select
        other_id,
        sum(pow(n_both - share * seen.n_tokens, 2) - pow(share * seen.n_tokens, 2)) as squares_beyond
    from by_document
    join seen using (owner)
    join shares using (other_id)
    group by other_id
),
sizes as (
    select
        shares.*,
        own.n_documents,
        effective_size(share, squares_beyond + pow(share, 2) * own.squares, own.n_seen, own.n_documents) as size
    from shares
    join spread using (other_id)
    cross join own
),
ends as (
    select
        *,
        least(greatest(floor(n_feature * share_low(share * size, size)), n_hits), n_other)::bigint as low,
        least(ceil(n_feature * share_high(share * size, size)), n_feature, n_other)::bigint        as high
    from sizes
)
select
    other_id,
    round(estimate)::bigint                  as n_both,
    low,
    high,
    n_feature,
    n_other,
    jaccard,
    jaccard_index(low, n_feature, n_other)   as jaccard_low,
    jaccard_index(high, n_feature, n_other)  as jaccard_high,
    n_hits                                   as n_seen,
    n_documents
from ends
order by jaccard_low desc, n_seen desc, other_id;
