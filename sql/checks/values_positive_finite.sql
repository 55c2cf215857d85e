-- Every value is positive and finite; in a signed run it may be below zero.
--
-- Grain:   one row per (feature, token) whose value is not.
-- Reads:   stg_feature_major, strength
-- Units:   value is in the units of the activations.
-- Ask it:  did anything overflow, or is a zero stored?
select feature_id, token_id, value
from stg_feature_major
where value is null or not isfinite(value) or strength(value) <= 0
order by feature_id, token_id;
