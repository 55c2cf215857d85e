-- Was a token encoded, so that a feature without a value there did not fire?
--
-- Grain:   scalar.
-- Reads:   src_is_encoded
-- Units:   token is a token_id, entry its vocabulary id. False for tokens that were added since the run was encoded, or
--          whose values are not to be seen, and at positions and special tokens that a setting leaves out; padding and
--          hidden documents are left to whoever asks.
-- Ask it:  which tokens of a text could have fired?
create or replace macro is_encoded(token, entry) as
src_is_encoded(token, entry);
