-- What each feature makes the model say next.
--
-- Grain:   one row per (feature, vocabulary entry): the 20 pushed up most and the 20 pushed down most.
-- Reads:   src_logits
-- Units:   logit is what a value of 1 adds to the entry's logit, centred over the vocabulary. No rows where the model's
--          output was not read.
-- Ask it:  which feature pushes an entry up most?
create or replace view stg_logits as
select feature_id, vocab_id, logit from src_logits;
