-- The documents, with whatever metadata columns this corpus has.
--
-- Grain:   one row per document.
-- Reads:   src_documents, src_hidden (forgotten and replaced documents are left out)
-- Units:   n_tokens counts real tokens.
-- Ask it:  which documents are held out?
create or replace view stg_documents as
select * from src_documents
anti join src_hidden using (document_id);
