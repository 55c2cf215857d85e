-- The vocabulary id of a token.
--
-- Grain:   scalar.
-- Reads:   src_vocab_id
-- Units:   null if there is no such token. The ids of padding are ids, too.
-- Ask it:  select vocab_id_of(4711)
create or replace macro vocab_id_of(token) as
(src_vocab_id(token));
