-- The documents of the sample.
--
-- Grain:   one row per visible document of the sample with encoded tokens.
-- Reads:   src_sample_documents, src_hidden
-- Units:   n_tokens counts encoded tokens. A token of stg_sample belongs to the last of these documents that begins at
--          or before it.
-- Ask it:  how many documents are in the sample?
create or replace view stg_sample_documents as
select document_id, first_token_id, n_tokens
from src_sample_documents
anti join src_hidden using (document_id);
