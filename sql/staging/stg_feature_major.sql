-- Every non-zero feature value, sorted so that one feature lies together.
--
-- Grain:   one row per (feature, token) at which the feature fires.
-- Reads:   src_feature_major
-- Units:   value is in the units of the activations.
-- Ask it:  where does one feature fire? (filter on feature_id: other row groups are skipped)
create or replace view stg_feature_major as
select feature_id, token_id, value from src_feature_major;
