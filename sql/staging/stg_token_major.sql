-- Every non-zero feature value, sorted so that the values of one token lie together.
--
-- Grain:   one row per (token, feature) at which the feature fires.
-- Reads:   src_token_major
-- Units:   value is in the units of the activations; low and high are the first and last token that the row's file may
--          hold.
-- Ask it:  what fires at token 7? (ask for token_id = 7 and 7 between low and high: other files stay closed)
create or replace view stg_token_major as
select token_id, feature_id, value, low, high from src_token_major;
