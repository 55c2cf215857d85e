-- Where several features are stronger than a threshold each.
--
-- Grain:   one row per (place in the lists, token) at which the feature at that place is above its threshold.
-- Reads:   stg_feature_major (only the files and row groups of these features), same_length
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
where value > wanted.threshold
    and case
        when same_length(features, thresholds)
            then list_bool_or(list_transform(features, lambda f: f between low and high))
    end;
