-- The documents, with whatever metadata columns this corpus has.
--
-- Grain:   one row per document.
-- Reads:   src_documents
-- Units:   n_tokens counts real tokens.
-- Ask it:  which documents are held out?
create or replace view stg_documents as
select * from src_documents;
