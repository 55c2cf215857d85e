-- Every non-zero feature value, sorted so that the values of one feature lie together.
--
-- Grain:   one row per (feature, token) at which the feature fires.
-- Reads:   src_feature_major
-- Units:   value is in the units of the activations; low and high are the first and last feature that the row's file
--          may hold.
-- Ask it:  where does feature 12 fire? (ask for feature_id = 12 and 12 between low and high: other files stay closed)
create or replace view stg_feature_major as
select feature_id, token_id, value, low, high from src_feature_major;
