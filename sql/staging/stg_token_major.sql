-- Every non-zero feature value, sorted so that one token lies together.
--
-- Grain:   one row per (token, feature) at which the feature fires.
-- Reads:   src_token_major
-- Units:   value is in the units of the activations.
-- Ask it:  which features fire at one token? (filter on token_id: other row groups are skipped)
create or replace view stg_token_major as
select token_id, feature_id, value from src_token_major;
