-- True if a token was encoded, so that a missing value there means that the feature was silent.
--
-- Grain:   scalar.
-- Reads:   src_is_encoded
-- Units:   token is a token_id, entry its vocabulary id. False for tokens added after the run was encoded, for tokens
--          whose values are hidden, and at positions and special tokens that a setting skips. Padding and hidden
--          documents must be left out by the caller.
-- Ask it:  which tokens of a text could have fired?
create or replace macro is_encoded(token, entry) as
src_is_encoded(token, entry);
