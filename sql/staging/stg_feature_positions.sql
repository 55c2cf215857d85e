-- How often and how strongly each feature fires in each band of positions, summed over the run's parts.
--
-- Grain:   one row per (feature, band) with tokens.
-- Reads:   src_feature_positions
-- Units:   band 0 is position 0; band b, from 1 on, holds the positions 2^(b - 1) to 2^b - 1. sum_value is in the units
--          of the activations.
-- Ask it:  how often does each feature fire at position 0?
create or replace view stg_feature_positions as
select feature_id, band, sum(n_tokens)::bigint as n_tokens, sum(sum_value) as sum_value
from src_feature_positions
group by feature_id, band;
