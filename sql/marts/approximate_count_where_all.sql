-- How many tokens there are at which several features are each beyond a threshold, counted in a sample of documents.
--
-- Grain:   one row.
-- Reads:   stg_sample, stg_sample_documents, stg_feature_stats, same_length, is_beyond, every_part_has_sample,
--          no_value_is_hidden, effective_size, share_low, share_high
-- Units:   n_tokens estimates that of count_where_all; 95 of 100 samples have the true number from low to high.
--          n_tokens = n_rarest * n_seen / (tokens of the sample at which the rarest of the features fires), n_rarest
--          being exact; null if it does not fire in the sample. Sample, interval and the other columns are those of
--          approximate_coactivation.
-- Parameters: features bigint[], thresholds double[]
-- Ask it:  how often do 12 and 34 both fire, about?  from approximate_count_where_all([12, 34], [0, 0.5])
create or replace macro approximate_count_where_all(features, thresholds) as table
with wanted as materialized (
    select
        unnest(features::bigint[])                as feature_id,
        unnest(thresholds::double[])              as threshold,
        unnest(generate_series(1, len(features))) as place
    where same_length(features, thresholds) and every_part_has_sample() and no_value_is_hidden()
),
rarest as materialized (
    select feature_id, n_tokens as n_rarest
    from stg_feature_stats
    where feature_id in (select feature_id from wanted)
    order by n_tokens, feature_id
    limit 1
),
fired as (
    select
        token_id,
        bool_or(feature_id = (select feature_id from rarest))                           as is_rarest,
        count(distinct place) filter (where is_beyond(value, threshold)) = len(features) as is_hit
    from stg_sample
    join wanted using (feature_id)
    group by token_id
),
by_document as materialized (
    select first_token_id, count(*)::double as n_tokens, count(*) filter (where is_hit) as n_hits
    from (select token_id, is_hit from fired where is_rarest) as mine
    asof join stg_sample_documents as places on mine.token_id >= places.first_token_id
    group by first_token_id
),
own as materialized (
    select
        coalesce(sum(mine.n_hits), 0)::bigint            as n_hits,
        count(*)                                         as n_documents,
        coalesce(sum(mine.n_tokens), 0)                  as n_seen,
        sum(mine.n_hits) / nullif(sum(mine.n_tokens), 0) as share
    from by_document as mine
),
spread as (
    select coalesce(sum(pow(by_document.n_hits - share * by_document.n_tokens, 2)), 0) as squares
    from by_document
    cross join own
),
sizes as (
    select n_rarest, own.*, effective_size(coalesce(share, 0), squares, own.n_seen, own.n_documents) as size
    from rarest
    cross join own
    cross join spread
)
select
    round(n_rarest * share)::bigint                                               as n_tokens,
    greatest(floor(n_rarest * share_low(coalesce(share, 0) * size, size)), n_hits)::bigint as low,
    least(ceil(n_rarest * share_high(coalesce(share, 0) * size, size)), n_rarest)::bigint  as high,
    n_rarest,
    n_hits                                                                        as n_seen,
    n_documents
from sizes;
