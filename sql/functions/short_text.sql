-- A text, a very long one cut.
--
-- Grain:   scalar.
-- Reads:   nothing
-- Units:   up to 1,000 bytes stay whole; of a longer text, the first 1,000 letters stay, with an ellipsis behind.
-- Ask it:  select short_text('love')
create or replace macro short_text(words) as
case when strlen(words) <= 1000 then words else left(words, 1000) || '…' end;
