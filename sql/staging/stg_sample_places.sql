-- The tokens that belong to each document of the sample.
--
-- Grain:   one row per visible document of the sample with encoded tokens.
-- Reads:   stg_sample_documents, stg_document_places
-- Units:   a document has the tokens from first_token_id to end_token_id - 1; n_tokens counts those that were encoded.
-- Ask it:  is token 4711 in the sample? (asof join on first_token_id, then ask for token_id < end_token_id)
create or replace view stg_sample_places as
select document_id, owners.first_token_id, owners.end_token_id, sampled.n_tokens
from stg_sample_documents as sampled
join stg_document_places as owners using (document_id);
