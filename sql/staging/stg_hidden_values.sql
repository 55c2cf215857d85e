-- The tokens whose values are hidden until they are encoded again: a document among them was forgotten or replaced.
--
-- Grain:   one row per part of the tokens that a compacted part of the run holds as it was before.
-- Reads:   src_hidden_values
-- Units:   the tokens first_token_id to last_token_id. Stored counts of the part, and statistics, still count them.
-- Ask it:  is every value shown?
create or replace view stg_hidden_values as
select first_token_id, last_token_id from src_hidden_values;
