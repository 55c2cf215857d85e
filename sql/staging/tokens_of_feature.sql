-- The tokens at which a feature fires, with its values.
--
-- Grain:   one row per token, in no order.
-- Reads:   stg_feature_major (only the row groups of this feature)
-- Units:   value is in the units of the activations.
-- Ask it:  from tokens_of_feature(12)
create or replace macro tokens_of_feature(feature) as table
select token_id, value from stg_feature_major where feature_id = feature and feature between low and high;
