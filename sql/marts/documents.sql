-- The documents, with all their metadata.
--
-- Grain:   one row per document, by document_id.
-- Reads:   stg_documents
-- Units:   n_tokens counts real tokens; first_token_id is the document's first token.
-- Ask it:  how many documents and tokens does each source have?
create or replace view documents as
select * from stg_documents
order by document_id;
