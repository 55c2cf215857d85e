-- How much each feature raises or lowers the logits of the next token.
--
-- Grain:   one row per (feature, vocabulary entry): the 20 pushed up most and the 20 pushed down most.
-- Reads:   src_logits
-- Units:   logit is what a value of 1 adds to the entry's logit, centred over the vocabulary. There are no rows if the
--          model has no logits, or if no direct path leads from the site to them.
-- Ask it:  which feature pushes an entry up most?
create or replace view stg_logits as
select feature_id, vocab_id, logit from src_logits;
