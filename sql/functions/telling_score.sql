-- How much a feature tells about a text: its strength there, times the bits that its firing carries.
--
-- Grain:   scalar.
-- Reads:   nothing
-- Units:   strength is in multiples of the feature's mean value when it fires; density is a share of encoded tokens.
--          The score is strength * -log2(density), as tf-idf weighs words (Spärck Jones 1972): a feature that fires
--          everywhere scores 0.
-- Ask it:  select telling_score(2, 0.25)  -- 4
create or replace macro telling_score(strength, density) as
(strength) * -log2(density);
