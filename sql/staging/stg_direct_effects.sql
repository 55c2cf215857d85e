-- What a value of 1 adds to the logits of the entries that changes of a feature moved, on the direct path.
--
-- Grain:   one row per (effect, feature, entry) among those that moved most at a changed token.
-- Reads:   src_direct_effects
-- Units:   logit is that of stg_logits, centred over the vocabulary. No rows if no direct path leads to the logits.
-- Ask it:  from stg_direct_effects where feature_id = 12
create or replace view stg_direct_effects as
select effect, feature_id, vocab_id, logit from src_direct_effects;
