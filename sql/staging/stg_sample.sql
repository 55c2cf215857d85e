-- The non-zero values of the sampled documents.
--
-- Grain:   one row per (feature, token) at which the feature fires, if the token's document is in the sample.
-- Reads:   src_sample
-- Units:   value is in the units of the activations. The sample is that of is_sampled.
-- Ask it:  where does feature 12 fire in the sample?
create or replace view stg_sample as
select feature_id, token_id, value from src_sample;
