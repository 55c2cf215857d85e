-- The tokens that were encoded, so that a missing value there means that a feature was silent.
--
-- Grain:   one row per encoded token of a visible document.
-- Reads:   stg_tokens, is_encoded
-- Units:   token_id = sequence * context length + position.
-- Ask it:  how many tokens could have fired?
create or replace view stg_tokens_encoded as
select token_id from stg_tokens where mask and is_encoded(token_id, vocab_id);
