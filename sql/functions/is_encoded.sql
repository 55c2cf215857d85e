-- True if a token was encoded, so that a missing value there means that the feature was silent.
--
-- Grain:   scalar.
-- Reads:   src_is_encoded, src_left_out
-- Units:   token is a token_id, entry its vocabulary id. False for tokens added after the run was encoded, for tokens
--          whose values are hidden, and for those that a setting skips: positions, special tokens and vectors that are
--          too long. Padding and hidden documents must be left out by the caller.
-- Ask it:  which tokens of a text could have fired?
create or replace macro is_encoded(token, entry) as
src_is_encoded(token, entry) and token not in (select token_id from src_left_out);
