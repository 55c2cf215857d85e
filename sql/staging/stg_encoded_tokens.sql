-- The number of encoded tokens by source and band of positions, summed over the run's parts.
--
-- Grain:   one row per (source, is_rest, band) with tokens.
-- Reads:   src_encoded_tokens
-- Units:   n_tokens counts real tokens that no setting skips. Bands are those of stg_feature_positions, sources those
--          of stg_feature_sources.
-- Ask it:  how many tokens could have fired?
create or replace view stg_encoded_tokens as
select src_encoded_tokens.source, is_rest, band, sum(n_tokens)::bigint as n_tokens
from src_encoded_tokens
group by src_encoded_tokens.source, is_rest, band;
