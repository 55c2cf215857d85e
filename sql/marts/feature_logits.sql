-- Which next tokens a feature makes the model more likely to say, and which less likely.
--
-- Grain:   one row per vocabulary entry: the 20 pushed up most, then the 20 pushed down most.
-- Reads:   stg_logits, stg_vocab
-- Units:   logit is what a value of 1 adds to the entry's logit, centred over the vocabulary. There are no rows if the
--          model has no logits, or if no direct path leads from the site to them.
-- Parameters: feature bigint
-- Ask it:  what does feature 12 predict?  from feature_logits(12)
create or replace macro feature_logits(feature) as table
with found as materialized (
    select vocab_id, logit from stg_logits where feature_id = feature
)
select vocab_id, stg_vocab.piece, found.logit
from found
join stg_vocab using (vocab_id)
order by found.logit desc, vocab_id;
