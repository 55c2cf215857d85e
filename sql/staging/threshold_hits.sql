-- Tokens at which several features are each beyond a threshold.
--
-- Grain:   one row per (place in the lists, token) at which the feature at that place is beyond its threshold.
-- Reads:   stg_feature_major (only files from the first to the last of these features, and of them the row groups of
--          these features), same_length, is_beyond
-- Units:   place counts from 1; value is in the units of the activations. Lists that are null, empty or of different
--          lengths are an error.
-- Ask it:  from threshold_hits([12, 34], [0, 0.5])
create or replace macro threshold_hits(features, thresholds) as table
with wanted as materialized (
    select
        unnest(features::bigint[])                as feature_id,
        unnest(thresholds::double[])              as threshold,
        unnest(generate_series(1, len(features))) as place
    where same_length(features, thresholds)
)
select wanted.place, token_id, value
from stg_feature_major
join wanted using (feature_id)
where is_beyond(value, wanted.threshold)
    and low <= case when same_length(features, thresholds) then list_max(features::bigint[]) end
    and high >= case when same_length(features, thresholds) then list_min(features::bigint[]) end;
