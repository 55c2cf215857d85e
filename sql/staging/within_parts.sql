-- The parts of the run whose stored counts are exact for a range.
--
-- Grain:   one row per part of the run with documents of the range, if is_counted of within_documents.
-- Reads:   within_documents
-- Units:   the arguments are those of within_documents.
-- Ask it:  from within_parts(null, null, null, 0, 3)
create or replace macro within_parts(sources, since, until, from_part, to_part) as table
select distinct folder from within_documents(sources, since, until, from_part, to_part) where is_counted;
