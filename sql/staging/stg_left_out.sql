-- The tokens that a run leaves out because their vectors are too long.
--
-- Grain:   one row per token of a visible document.
-- Reads:   src_left_out
-- Units:   length is Euclidean, in the units of the activations. Empty without activations.skip_norms_above.
-- Ask it:  where are the attention sinks?
create or replace view stg_left_out as
select token_id, vocab_id, length from src_left_out;
