-- The bin of a quarter octave that a value lies in.
--
-- Grain:   scalar.
-- Reads:   nothing
-- Units:   bin 4 * e + q holds the values from 2^e * (1 + q / 4) to below 2^e * (1 + (q + 1) / 4), q from 0 to 3.
-- Ask it:  select value_bin(1.6)  -- 2
create or replace macro value_bin(strength) as
(
    4 * floor(log2((strength)::double))
    + floor(4 * ((strength)::double / pow(2, floor(log2((strength)::double))) - 1))
)::bigint;
