-- Why a setting leaves a token of the corpus out of the run, but for the length of its vector.
--
-- Grain:   scalar.
-- Reads:   src_skip_reason
-- Units:   'position', 'special' or 'role', the first that applies; null if none does.
-- Parameters: token bigint, entry integer: the token's vocab_id
-- Ask it:  why was token 4711 not encoded?
create or replace macro skip_reason(token, entry) as
src_skip_reason(token, entry);
