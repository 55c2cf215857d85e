-- The corpus as it was fed to the model, with padding.
--
-- Grain:   one row per (sequence, position).
-- Reads:   src_tokens, src_hidden (tokens of forgotten and replaced documents are left out)
-- Units:   position counts from 0 inside the sequence; mask is true for real tokens.
-- Ask it:  which document does token 4711 belong to?
create or replace view stg_tokens as
select token_id, vocab_id, document_id, position, mask
from src_tokens
anti join src_hidden using (document_id);
