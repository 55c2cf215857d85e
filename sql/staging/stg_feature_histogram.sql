-- How strongly each feature fires: token counts in bins of a quarter octave, summed over the run's parts.
--
-- Grain:   one row per (feature, bin) with tokens.
-- Reads:   src_feature_histogram
-- Units:   bin 4 * e + q holds the values from 2^e * (1 + q / 4) to below 2^e * (1 + (q + 1) / 4), q from 0 to 3.
--          A bin below -1024 holds values below zero: see value_bin.
-- Ask it:  how many values lie between 1 and 1.25? (bin 0)
create or replace view stg_feature_histogram as
select feature_id, bin, sum(n_tokens)::bigint as n_tokens
from src_feature_histogram
group by feature_id, bin;
