-- The tokens of a new text, which need not be in the corpus, with a feature's value at each.
--
-- Grain:   one row per token, in the text's order.
-- Reads:   nothing: saeflow runs the model and the SAE on the text
-- Units:   the text is read as a document of the corpus would be. place counts from 0, special tokens included. If the
--          bytes of a letter are spread over several tokens, the letter belongs to the token that begins it. value is
--          the feature's, in the units of the activations, 0 where it is silent; null without a feature. n_features
--          counts the features that fire. Both are null at tokens that a setting of the run skips. model is that of
--          features_of_text.
-- Parameters: text text, feature bigint = null, model text = ''
-- Ask it:  where in a sentence of mine does feature 12 fire?  from text_tokens('A shipwreck at sea', 12)
create or replace macro text_tokens(text, feature := null, model := '', readings := null) as table
with found as materialized (
    select unnest(
        coalesce(readings, error('text_tokens runs the model: ask it by `saeflow ask`, or in Python'))::struct(
            place bigint, vocab_id bigint, piece varchar, value double, n_features bigint
        )[],
        recursive := true
    )
)
from found order by place;
