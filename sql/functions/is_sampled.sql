-- True if a document is in the sample. Each part stores the sample's values apart: a 64th of all documents.
--
-- Grain:   scalar.
-- Reads:   nothing
-- Units:   the document's key alone decides, by its MD5: so the sample is one for all features and runs.
-- Ask it:  select is_sampled('emma')
create or replace macro is_sampled(key) as
md5(key) < '04';
